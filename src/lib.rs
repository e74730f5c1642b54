//! Kernels of a Mixture-of-Experts transformer.
