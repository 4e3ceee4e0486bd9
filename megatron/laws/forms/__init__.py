"""The forms of scaling laws, one file per form; megatron/laws/registry.py lists them."""
