"""Any device that torch drives, every operator in plain torch; tuned kernels plug in on top."""
