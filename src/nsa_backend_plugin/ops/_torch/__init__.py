"""What the torch references share: rotary embedding, Hadamard rotation, norms."""
