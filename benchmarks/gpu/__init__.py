"""What `make gpu` runs, on a machine where nothing but torch is prepared: only the pieces themselves need more."""
