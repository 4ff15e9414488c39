"""What others see: the card, its pictures, and the push to the Hub."""
