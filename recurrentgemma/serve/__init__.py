"""The server: rows of many clients in one running batch, asked over HTTP as OpenAI's API is."""
