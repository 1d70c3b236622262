"""Our models in other programs: transformers, sentence-transformers, mteb and X-ARES. Each module imports its own."""
