"""One conversion from the Hub to the Hub: what is published, pushed, verified, exported."""
