"""What came before deep networks: graph cuts, superpixels, wavelets and Gaussian processes."""
