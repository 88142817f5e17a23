"""What is compared with what: one file per family, with its CASES and ORACLES."""
