"""The MNIST study of stable neural ODEs, built from the public blocks of `odelayers`."""
