"""The completion server: requests of many protocols, one engine, one model."""
