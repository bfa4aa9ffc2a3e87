"""Everything a rank imports, megatron after the stand-ins for what it expects of CUDA."""

from glm import platform

platform.activate("host")

import pretrain.tokenizer  # noqa: E402, F401
import pretrain.train  # noqa: E402, F401
