"""What came before deep networks: regions, features and classifiers that a person can follow from pixel to answer, on NumPy alone."""
