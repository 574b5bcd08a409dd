"""What several tests need, one idea a module; test modules import nothing from one another."""
