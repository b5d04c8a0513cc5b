"""What is made of the measurements, and what stands beside the paper's numbers: tables, figures, ledger, pages."""
