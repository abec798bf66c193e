"""A chip for Sartor, from outside: a backend to start from, and one CPU kernel in C."""
