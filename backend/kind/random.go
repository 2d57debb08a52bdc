package kind

import (
	"errors"
	"fmt"
	"io"
)

// maxPasses bounds how often RandomString asks again for what it had to throw
// away. Less than half of all bytes are thrown away with any alphabet, so a
// source that uses up 128 passes is broken (odds of n in 2^128).
const maxPasses = 128

// RandomBytes reads n bytes from src, or fails.
func RandomBytes(src io.Reader, n int) ([]byte, error) {
	if n < 1 {
		return nil, fmt.Errorf("%d random bytes were asked for: ask for at least 1", n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(src, b); err != nil {
		return nil, fmt.Errorf("the source of randomness failed: %w", err)
	}
	return b, nil
}

// RandomString makes n characters of alphabet, each equally likely, from the
// randomness of src alone. The alphabet is 2 to 128 different ASCII characters.
//
// A byte modulo the size of the alphabet would favour its first characters, so
// bytes beyond the largest multiple of that size are thrown away.
func RandomString(src io.Reader, n int, alphabet string) (string, error) {
	if err := checkAlphabet(alphabet); err != nil {
		return "", err
	}
	if n < 1 {
		return "", fmt.Errorf("%d random characters were asked for: ask for at least 1", n)
	}
	size := len(alphabet)
	usable := 256 - 256%size
	out := make([]byte, 0, n)
	for range maxPasses {
		raw, err := RandomBytes(src, n-len(out))
		if err != nil {
			return "", err
		}
		for _, b := range raw {
			if int(b) < usable {
				out = append(out, alphabet[int(b)%size])
			}
		}
		if len(out) == n {
			return string(out), nil
		}
	}
	return "", errors.New("the source of randomness keeps giving bytes that cannot be used: check it")
}

func checkAlphabet(alphabet string) error {
	var seen [128]bool
	for i := range len(alphabet) {
		c := alphabet[i]
		if c >= 128 || seen[c] {
			return errors.New("the alphabet must be ASCII characters, each once")
		}
		seen[c] = true
	}
	if len(alphabet) < 2 {
		return errors.New("the alphabet must have at least 2 characters")
	}
	return nil
}
