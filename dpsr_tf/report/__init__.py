"""`dpsr report`: the experiments of the DPSR paper (section 6) and a report of them."""
