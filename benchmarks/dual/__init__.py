"""What DUAL reaches, beside what other denoisers and simulations reach."""
