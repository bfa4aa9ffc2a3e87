"""The stand-ins are in place in a process of SGLang, are still needed, and a missing one stops the process."""

import json
import subprocess
import sys
import textwrap

import pytest

from glm.platform.host_sglang.environment import server_environment


def in_host_process(code, **environment):
    """Runs ``code`` with SGLang's plug-ins loaded as in a server; returns its last line as JSON."""
    program = "from sglang.srt.plugins import load_plugins\nload_plugins()\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], env=server_environment("host") | environment, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def findings():
    """What one process of SGLang says about the seams; importing it takes six seconds, so all is asked at once."""
    return in_host_process("""
        import inspect, json, pkgutil, sys
        from sglang.srt.model_executor import model_runner          # initialises the platform, which verifies the seams
        from sglang.srt.models.glm4_moe import Glm4MoeForCausalLM
        from sglang.srt.platforms import current_platform
        from glm.errors import PlatformError
        from glm.platform.host_sglang import hooks

        def fault_of(change, undo):
            change()
            try:
                hooks.verify_seams()
            except PlatformError as problem:
                return problem.found
            finally:
                undo()
            return "nothing noticed"

        found = {"platform": type(current_platform).__name__, "real_torchvision": hasattr(sys.modules["torchvision"], "ops")}
        hooks.verify_seams()

        from sglang.kernels.ops.speculative import row_argmax, spec_tree
        replaced = spec_tree.verify_tree_greedy_func
        found["undone"] = fault_of(lambda: setattr(spec_tree, "verify_tree_greedy_func", replaced.__wrapped__),
                                   lambda: setattr(spec_tree, "verify_tree_greedy_func", replaced))
        from sglang.srt.speculative import eagle_utils
        found["stale"] = fault_of(lambda: setattr(eagle_utils, "verify_tree_greedy_func", replaced.__wrapped__),
                                  lambda: setattr(eagle_utils, "verify_tree_greedy_func", replaced))
        kept = row_argmax.row_argmax
        found["gone"] = fault_of(lambda: delattr(row_argmax, "row_argmax"), lambda: setattr(row_argmax, "row_argmax", kept))
        renorm = eagle_utils.top_k_renorm_prob
        found["empty"] = fault_of(lambda: setattr(eagle_utils, "top_k_renorm_prob", None),
                                  lambda: setattr(eagle_utils, "top_k_renorm_prob", renorm))
        ours = hooks.REPLACED["sglang.kernels.ops.speculative.row_argmax.row_argmax"]
        found["arguments"] = fault_of(lambda: setattr(ours, "__signature__", inspect.signature(lambda x, y: 0)),
                                      lambda: delattr(ours, "__signature__"))
        found["after"] = fault_of(lambda: None, lambda: None)

        found["originals"] = {
            target: inspect.getsource(inspect.unwrap(pkgutil.resolve_name(target))) for target in hooks.REPLACED
        }
        found["set_embed_and_head"] = inspect.getsource(Glm4MoeForCausalLM.set_embed_and_head)
        print(json.dumps(found))
    """)


def test_a_host_process_runs_on_our_platform_with_every_stand_in(findings):
    assert findings["platform"] == "HostPlatform"
    assert findings["after"] == "nothing noticed"


def test_a_stand_in_that_is_undone_is_named(findings):
    assert "spec_tree.verify_tree_greedy_func is not replaced" in findings["undone"]


def test_a_copy_that_still_is_sglangs_own_is_named(findings):
    assert "still SGLang's own in sglang.srt.speculative.eagle_utils.verify_tree_greedy_func" in findings["stale"]


def test_a_target_that_is_gone_is_named(findings):
    assert "row_argmax.row_argmax does not exist" in findings["gone"]


def test_other_arguments_than_ours_are_named(findings):
    assert "row_argmax takes ['x'], ours takes ['x', 'y']" in findings["arguments"]


def test_an_empty_slot_is_named(findings):
    assert "eagle_utils.top_k_renorm_prob is None" in findings["empty"]


def test_every_stand_in_is_still_needed(findings):
    """A kernel that upstream gives a CPU path of its own, without sgl_kernel, no longer needs ours: then this fails."""
    for target, source in findings["originals"].items():
        assert "triton" in source or "[(" in source or "reject_out_of_tree_path" in source or "sgl_kernel" in source, target
    assert "torch.cuda.synchronize()" in findings["set_embed_and_head"]
    assert not findings["real_torchvision"]


def test_hooks_do_nothing_on_another_platform():
    code = """
        import json
        from sglang.srt.plugins.hook_registry import HookRegistry
        import sys
        print(json.dumps([list(HookRegistry._hooks), "glm.platform.host_sglang.platform" in sys.modules]))
    """
    assert in_host_process(code, SGLANG_PLATFORM="") == [[], False]
