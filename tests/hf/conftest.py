"""Nothing in this folder is collected from here: `run.py` puts it beside transformers' own tests (``make test-hf``)."""

collect_ignore_glob = ["*"]
