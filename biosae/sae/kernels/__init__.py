"""Kernels of the sparse training step, one module a backend; `biosae.sae.sparse_ops` chooses among them."""
