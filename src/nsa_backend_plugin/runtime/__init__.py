"""What any engine needs and no engine owns. Imports torch, never SGLang."""
