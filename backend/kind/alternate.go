package kind

import (
	"fmt"
	"slices"
	"strings"
)

// Turn is whose turn it is to be changed: the user of a role of strategy
// Alternate that m is not for.
func (s Spec) Turn(m Material) string {
	if len(s.Usernames) == 2 && s.Usernames[0] == m.Username {
		return s.Usernames[1]
	}
	if len(s.Usernames) == 2 {
		return s.Usernames[0]
	}
	return s.Username
}

// CompleteUsers checks username, usernames and strategy together: the default is
// fallback, or alternate where two users are given. named says why a name cannot
// be one, "" where it can. allowed are the strategies of the kind.
func (s *Spec) CompleteUsers(kindName string, fallback Strategy, named func(string) string, allowed ...Strategy) error {
	if s.Strategy == "" {
		s.Strategy = fallback
		if len(s.Usernames) > 0 {
			s.Strategy = Alternate
		}
	}
	if !slices.Contains(allowed, s.Strategy) {
		words := make([]string, len(allowed))
		for i, a := range allowed {
			words[i] = string(a)
		}
		return fmt.Errorf("strategy is %.64q: roles of kind %s rotate with %s", s.Strategy, kindName, strings.Join(words, " or "))
	}
	users := s.Owns()
	switch {
	case s.Strategy != Alternate && len(s.Usernames) > 0:
		return fmt.Errorf("usernames names users that take turns, and strategy is %q: give username, or strategy=alternate", s.Strategy)
	case s.Strategy == Alternate && s.Username != "":
		return fmt.Errorf("username is %.64q and strategy is alternate: give usernames, two of them, and no username", s.Username)
	case s.Strategy == Alternate && (len(s.Usernames) != 2 || s.Usernames[0] == s.Usernames[1]):
		return fmt.Errorf("usernames holds %d: strategy alternate needs two different users, the one that is in use first", len(s.Usernames))
	}
	for _, u := range users {
		if why := named(u); why != "" {
			field := "username"
			if s.Strategy == Alternate {
				field = "usernames"
			}
			return fmt.Errorf("%s is %.128q: %s", field, u, why)
		}
	}
	return nil
}

// maxDifferences bounds how much of two profiles is shown.
const maxDifferences = 8

// Differences says how a user differs from another whose place it is to take, "" where
// it does not. Lines of a profile have to be fit to be shown.
func Differences(user string, has []string, other string, should []string) string {
	var words []string
	for _, l := range should {
		if !slices.Contains(has, l) {
			words = append(words, "lacks "+l)
		}
	}
	for _, l := range has {
		if !slices.Contains(should, l) {
			words = append(words, "has "+l)
		}
	}
	if len(words) == 0 {
		return ""
	}
	if more := len(words) - maxDifferences; more > 0 {
		words = append(words[:maxDifferences], fmt.Sprintf("%d more", more))
	}
	return fmt.Sprintf("user %s differs from %s, whose place it is to take: it %s", user, other, strings.Join(words, ", "))
}
