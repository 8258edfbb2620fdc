"""The trained model as a product: scored in a plain process, without Ray and without a process group."""
