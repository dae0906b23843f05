"""The end-time study: what the time to which a neural ODE is solved does to accuracy and robustness."""
