"""Built-in parents. Each is one module, imported when somebody first asks for it."""
