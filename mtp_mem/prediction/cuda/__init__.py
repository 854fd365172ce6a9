"""What CUDA kernels, cuBLAS and allocator settings add to a step: sizes by rule, and the replay that uses them."""
