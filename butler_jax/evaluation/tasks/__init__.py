"""What a contender is judged on."""
