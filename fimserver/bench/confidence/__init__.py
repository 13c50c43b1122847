"""How sure an offer is, and how sure it has to be: places, fit and curve."""
