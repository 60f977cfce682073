"""Whole layers and servers beside stock SGLang."""
