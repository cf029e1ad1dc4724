"""One script per claim; results with the machine's description beside them."""
