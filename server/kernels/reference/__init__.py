"""Plain torch definitions of the operations; also what runs on a CPU."""
