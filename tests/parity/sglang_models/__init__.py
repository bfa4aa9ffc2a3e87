"""What a server of test_sglang_draft.py loads (SGLANG_EXTERNAL_MODEL_PACKAGE): SGLang's own classes, a listener on the draft."""
