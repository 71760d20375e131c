"""The fault matrix: tables of cases by area, and the harness that runs real doors against them."""
