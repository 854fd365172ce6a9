"""What is trained: the multi-token-prediction model, its heads as a tree, their losses."""
