"""Scripts that make the weights bundled with biosae."""
