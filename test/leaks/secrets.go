package leaks

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
)

// What tests give and what they see of the engine, for as long as their process lives.
var secrets = struct {
	sync.Mutex
	planted map[string]string   // by secret: what it is
	seen    map[string][]string // by text: where it stood
}{planted: map[string]string{}, seen: map[string][]string{}}

// shortest is how long a secret is that is told from a word.
const shortest = 8

// Plant makes a secret known, which may stand in nothing that is looked at, before or
// after. Short ones are words that stand everywhere.
func Plant(what, secret string) {
	if len(secret) < shortest {
		return
	}
	secrets.Lock()
	defer secrets.Unlock()
	secrets.planted[secret] = what
}

// Look keeps a text that somebody may see: an error, a line of a log, an answer.
func Look(where, text string) {
	secrets.Lock()
	defer secrets.Unlock()
	if at := secrets.seen[text]; len(at) < 3 && !slices.Contains(at, where) {
		secrets.seen[text] = append(at, where)
	}
}

// Leaked says which secrets stand in what was looked at, by what they are.
func Leaked() error {
	secrets.Lock()
	defer secrets.Unlock()
	all := strings.Builder{}
	for text := range secrets.seen {
		all.WriteString(text)
		all.WriteByte('\n')
	}
	var found []string
	for secret, what := range secrets.planted {
		for form, shape := range Shapes(secret) {
			if !strings.Contains(all.String(), shape) {
				continue
			}
			for text, where := range secrets.seen {
				if strings.Contains(text, shape) {
					found = append(found, fmt.Sprintf("%s holds a secret (%s, %s)", strings.Join(where, ", "), what, form))
				}
			}
		}
	}
	if len(found) == 0 {
		return nil
	}
	slices.Sort(found)
	return fmt.Errorf("secrets stand where they must not:\n%s", strings.Join(slices.Compact(found), "\n"))
}

// Shapes is how a secret may look to somebody who finds it.
func Shapes(secret string) map[string]string {
	inJSON, _ := json.Marshal(secret)
	sum := sha256.Sum256([]byte(secret))
	all := map[string]string{
		"plain": secret, "in JSON": strings.Trim(string(inJSON), `"`), "quoted by Go": strings.Trim(fmt.Sprintf("%q", secret), `"`),
		"hexadecimal": hex.EncodeToString([]byte(secret)), "HEXADECIMAL": strings.ToUpper(hex.EncodeToString([]byte(secret))),
		"in a query": url.QueryEscape(secret), "in a path": url.PathEscape(secret),
		"SHA-256": hex.EncodeToString(sum[:]),
	}
	// In base64 of something longer it looks different for each of the three
	// places where it may begin; what its neighbours decide is left out.
	for shift := range 3 {
		encoded := base64.RawStdEncoding.EncodeToString([]byte(strings.Repeat("\x00", shift) + secret))
		inner := encoded[[3]int{0, 2, 3}[shift] : len(encoded)-1]
		all[fmt.Sprintf("base64, %d", shift)] = inner
		all[fmt.Sprintf("base64url, %d", shift)] = strings.NewReplacer("+", "-", "/", "_").Replace(inner)
	}
	return all
}
