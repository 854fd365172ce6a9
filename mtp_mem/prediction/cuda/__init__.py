"""What CUDA, cuBLAS and the settings of its allocator add to a step: sizes by rule, and the replay that uses them."""
