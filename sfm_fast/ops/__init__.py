"""Operations below the public API: which backend runs them, and (in later files) their kernels' registration."""
