"""The studio: a page in the browser to play with the three problems; nothing else imports it."""
