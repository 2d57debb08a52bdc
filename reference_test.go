package harmonyflow

import (
	"cmp"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

var update = flag.Bool("update", false, "write what is generated in docs/")

// generated holds a file of docs/ against what it is made from.
func generated(t *testing.T, name, want string) {
	t.Helper()
	file := filepath.Join("docs", name)
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(want), 0o644))
		return
	}
	got, err := os.ReadFile(filepath.Clean(file))
	require.NoError(t, err)
	require.True(t, string(got) == want, "docs/%s is stale; write it with make docs", name)
}

// TestReference: docs/reference/api.md says what the paths declare.
func TestReference(t *testing.T) {
	t.Parallel()
	generated(t, "reference/api.md", reference(newMount(t).b))
}

// TestStateMachine: docs/state-machine.md shows the transition tables, and docs/model
// is checked against them.
func TestStateMachine(t *testing.T) {
	t.Parallel()
	generated(t, "state-machine.md", stateMachine())
	generated(t, "model/transitions.h", rotation.Transitions())
}

var parameterRegexp = regexp.MustCompile(`\(\?P<(\w+)>(?:[^()]|\([^()]*\))+\)`)

// human is a path as people type it; a folder ends with a slash.
func human(p *framework.Path) string {
	text := strings.TrimSuffix(parameterRegexp.ReplaceAllString(strings.Trim(p.Pattern, "^$"), "<$1>"), "?")
	text = strings.TrimSuffix(text, "/")
	if p.Operations[logical.ListOperation] != nil {
		text += "/"
	}
	return text
}

var kindsOfFields = map[framework.FieldType]string{
	framework.TypeString: "string", framework.TypeBool: "bool", framework.TypeInt: "int", framework.TypeInt64: "int", framework.TypeMap: "map",
	framework.TypeDurationSecond: "duration", framework.TypeSlice: "list", framework.TypeStringSlice: "list of strings",
	framework.TypeCommaStringSlice: "list of strings", framework.TypeTime: "time", framework.TypeKVPairs: "map of strings", framework.TypeFloat: "number",
}

var verbs = map[logical.Operation]string{
	logical.ReadOperation: "GET", logical.ListOperation: "LIST", logical.CreateOperation: "POST", logical.UpdateOperation: "POST",
	logical.PatchOperation: "PATCH", logical.DeleteOperation: "DELETE",
}

var commands = map[logical.Operation]string{
	logical.ReadOperation: "read", logical.ListOperation: "list", logical.CreateOperation: "write", logical.UpdateOperation: "write",
	logical.PatchOperation: "patch", logical.DeleteOperation: "delete",
}

func reference(b *backend) string {
	var out strings.Builder
	out.WriteString(`# API

Made from the definitions of the paths (` + "`make docs`" + `), which ` + "`vault path-help harmonyflow/<path>`" + ` and Vault's OpenAPI document show as well. Paths are below the
mount, here ` + "`harmonyflow/`" + `; over HTTP they stand below ` + "`/v1/harmonyflow/`" + `.

- A duration is written as Vault's (` + "`768h`, `30s`, or a number of seconds" + `) and read back as a number of seconds; a list is written as strings separated by commas
  or as a JSON list, and read back as a list. An empty value clears a field.
- A field that ends with ` + "`Of …`" + ` is for roles of these kinds, or connections of these types, and refused to others.
- An unknown field, a value that is not allowed, and fields that contradict each other are refused with 400 and one sentence. 403 is Vault's own: the token may not. 404: it is not
  there. 409: not now; the sentence says what to do. 304: as the client has it, by its ETag. Answers that are declared without fields have none.
- Answers about rotations have a further field for each of the first twenty roles, named ` + "`<kind>/<role>`" + `, and for each of the first twenty consumers, named
  ` + "`consumer <name>`" + `: a line for a terminal.

`)
	families := map[string][]*framework.Path{}
	for _, p := range b.Paths {
		family, _, _ := strings.Cut(human(p), "/")
		families[family] = append(families[family], p)
	}
	for _, family := range slices.Sorted(maps.Keys(families)) {
		fmt.Fprintf(&out, "- [%s](#%s)", family, family)
		for _, p := range families[family] {
			fmt.Fprintf(&out, " `%s`", human(p))
		}
		out.WriteString("\n")
	}
	for _, family := range slices.Sorted(maps.Keys(families)) {
		fmt.Fprintf(&out, "\n## %s\n", family)
		for _, p := range families[family] {
			describePath(&out, p, b.whose(human(p)))
		}
	}
	return out.String()
}

func describePath(out *strings.Builder, p *framework.Path, whose map[string][]string) {
	name := human(p)
	fmt.Fprintf(out, "\n### `%s`\n\n", name)
	for paragraph := range strings.SplitSeq(p.HelpDescription, "\n\n") {
		if text := cell(paragraph); text != "" {
			out.WriteString(text + "\n\n")
		}
	}
	ops := slices.SortedFunc(maps.Keys(p.Operations), func(a, b logical.Operation) int {
		return cmp.Or(strings.Compare(verbs[a], verbs[b]), strings.Compare(string(a), string(b)))
	})
	out.WriteString("| | | answers |\n|---|---|---|\n")
	for _, op := range ops {
		props := p.Operations[op].Properties()
		var codes []string
		for _, code := range slices.Sorted(maps.Keys(props.Responses)) {
			codes = append(codes, fmt.Sprint(code))
		}
		fmt.Fprintf(out, "| `%s` | `vault %s harmonyflow/%s`: %s | %s |\n", verbs[op], commands[op], name, cell(props.Summary), strings.Join(codes, ", "))
	}
	table(out, "Fields", name, p.Fields, whose)
	shown := map[string]bool{}
	for _, op := range ops {
		for _, r := range p.Operations[op].Properties().Responses[200] {
			var names []string
			for field := range r.Fields {
				names = append(names, field)
			}
			slices.Sort(names)
			if key := strings.Join(names, ","); key != "" && !shown[key] {
				shown[key] = true
				table(out, fmt.Sprintf("Answer of `%s`", verbs[op]), "", r.Fields, nil)
			}
		}
	}
}

// whose says which kinds of roles, or types of connections, have a field that not all have.
func (b *backend) whose(path string) map[string][]string {
	out := map[string][]string{}
	switch path {
	case "roles/<name>":
		for _, k := range b.kinds {
			for _, name := range k.Fields() {
				if !k.hidden && slices.Contains(kindsOwn, name) {
					out[name] = append(out[name], k.Name())
				}
			}
		}
	case "connections/<name>":
		for _, t := range b.connectionTypes {
			for name := range t.fields {
				out[name] = append(out[name], t.name)
			}
		}
	}
	return out
}

func table(out *strings.Builder, title, path string, fields map[string]*framework.FieldSchema, whose map[string][]string) {
	if len(fields) == 0 {
		return
	}
	fmt.Fprintf(out, "\n%s:\n\n| field | type | |\n|---|---|---|\n", title)
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		f := fields[name]
		what := cell(f.Description)
		if f.Default != nil && !strings.Contains(what, "Default ") && !strings.Contains(what, "efault") {
			what += fmt.Sprintf(" Default %v.", f.Default)
		}
		if of := slices.Sorted(slices.Values(whose[name])); len(of) > 0 {
			what += " Of " + strings.Join(of, ", ") + "."
		}
		switch {
		case strings.Contains(path, "<"+name+">"):
			what += " Part of the path."
		case f.Required:
			what += " Required."
		}
		if f.DisplayAttrs != nil && f.DisplayAttrs.Sensitive && !strings.Contains(what, "ever read back") && !strings.Contains(what, "shown again") {
			what += " Never read back."
		}
		fmt.Fprintf(out, "| `%s` | %s | %s |\n", name, kindsOfFields[f.Type], what)
	}
}

// cell is a text as a cell of a table takes it.
func cell(text string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;", ">", "&gt;").Replace(strings.Join(strings.Fields(text), " "))
}

func stateMachine() string {
	var out strings.Builder
	out.WriteString(`# The state machine

Made from the transition tables of the code (` + "`make docs`" + `); nothing else moves a rotation from one phase to another. [model/](model/README.md) is the same machine for a model
checker. What a phase does is in ` + "`backend/rotation`" + `; what a state means to people, and what to do about it, in [operations.md](operations.md).

` + "`done`" + `: what the phase is for is proven. ` + "`bad`" + `: a definite bad result, or its deadline has passed. ` + "`recall`" + `: somebody asked to cancel or to roll back, or a consumer
failed. A phase that is not left by ` + "`bad`" + ` is tried again until it succeeds. ` + "`kept`" + `: the earlier key stays in its ring. ` + "`anew`" + `: it was taken back with others that
shared its restart, and begins once more, alone. ` + "`missed`" + `: a consumer of an emergency could not be proven. A role without a document, consumers or grace passes through
those phases at once. An emergency takes a role over from any phase of another rotation, and begins with its own.

## States

What ` + "`rotations/<id>`" + ` shows as ` + "`state`" + `, and in which phases. A rotation of several roles shows what is furthest from its end; what each of them is in stands under ` + "`roles`" + `.

| state | when |
|---|---|
`)
	for _, s := range rotation.States {
		fmt.Fprintf(&out, "| `%s` | %s |\n", s, s.Meaning())
	}
	out.WriteString("\n")
	for _, m := range rotation.Machines() {
		fmt.Fprintf(&out, "## %s\n\n%s\n\n```mermaid\nstateDiagram-v2\n", m.Title, m.What)
		fmt.Fprintf(&out, "    [*] --> %s\n", m.Legs[0].From)
		for _, l := range m.Legs {
			to := l.To
			if to == "" {
				to = l.End
			}
			fmt.Fprintf(&out, "    %s --> %s: %s\n", l.From, to, l.On)
		}
		ends := map[string]bool{}
		for _, l := range m.Legs {
			if l.End != "" && !ends[l.End] {
				ends[l.End] = true
				fmt.Fprintf(&out, "    %s --> [*]\n", l.End)
			}
		}
		out.WriteString("```\n\n")
	}
	return strings.TrimSuffix(out.String(), "\n")
}
