"""The models a host server can load, as SGLang's own classes (SGLANG_EXTERNAL_MODEL_PACKAGE, S/models/registry.py:154).

Without this package SGLang imports all of its 200 model files in every server: 2.5 s of start-up.
"""
