"""The GPU side of the engine: DSA and MLA backends on top of SGLang's own, and the fused decode path."""
