"""From a prompt to its completion: settings, text, the decoding engine and its cache."""
