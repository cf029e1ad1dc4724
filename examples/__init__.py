"""Small programs that use cg_jax."""
