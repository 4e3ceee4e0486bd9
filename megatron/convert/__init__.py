"""Conversion of runs to and from Hugging Face transformers, and from Megatron-DeepSpeed."""
