"""GSM8K through a running server, and the paired comparison of two runs. Used by `nsa-plugin gsm8k`."""
