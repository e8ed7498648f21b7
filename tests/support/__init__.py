"""What several tests share: a tiny base model, adapters made with PEFT, a server process, a client."""
