"""Traffic on adapters that change all the while, and the proof that every answer came from the adapter it names."""
