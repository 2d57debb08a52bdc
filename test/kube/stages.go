package kube

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// What a pod does, said by an annotation of its template. None of them goes
// with another one, but TerminateAfter, which goes with all.
const (
	NeverReady       = "kwok.test/never-ready"        // runs, and is not ready
	ReadyAfter       = "kwok.test/ready-after"        // is ready after a duration ("5s")
	CrashLoop        = "kwok.test/crash-loop"         // crashes at the start, and again every second
	CrashAfter       = "kwok.test/crash-after"        // is ready, and crashes after a duration, and again every second
	ImagePullBackOff = "kwok.test/image-pull-backoff" // has an image that is not there
	TerminateAfter   = "kwok.test/terminate-after"    // takes a duration to go when it is deleted
)

var (
	//go:embed stages.yaml
	ownStages []byte
	//go:embed crash.tmpl
	crashTemplate string
)

// writeStages writes the configuration of KWOK: the stages that came with it,
// which lie beside the program, and ours.
func writeStages(program, into string) error {
	files, err := filepath.Glob(filepath.Join(filepath.Dir(program), "stages", "*.yaml"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("there are no stages of KWOK beside %s: build it with scripts/ensure-kube.sh", program)
	}
	var stages []unstructured.Unstructured
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("read the stages of KWOK: %w", err)
		}
		objects, err := decode(data)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		stages = append(stages, objects...)
	}
	own, err := decode(ownStages)
	if err != nil {
		return fmt.Errorf("stages.yaml: %w", err)
	}
	stages = append(stages, own...)
	var out bytes.Buffer
	for _, stage := range stages {
		if err := amend(stage); err != nil {
			return fmt.Errorf("stage %s: %w", stage.GetName(), err)
		}
		data, err := json.Marshal(stage.Object)
		if err != nil {
			return fmt.Errorf("stage %s: %w", stage.GetName(), err)
		}
		fmt.Fprintf(&out, "---\n%s\n", data) // JSON is YAML
	}
	if err := os.WriteFile(into, out.Bytes(), 0o600); err != nil {
		return fmt.Errorf("write the stages of KWOK: %w", err)
	}
	return nil
}

// amend makes room for our stages in those of KWOK, and fills in ours.
func amend(stage unstructured.Unstructured) error {
	switch stage.GetName() {
	case "pod-ready":
		const path = "matchExpressions"
		conditions, _, err := unstructured.NestedSlice(stage.Object, "spec", "selector", path)
		if err != nil {
			return err
		}
		for _, annotation := range []string{NeverReady, CrashLoop, ImagePullBackOff, simulated} {
			conditions = append(conditions, map[string]any{"key": annotationOf(annotation), "operator": "DoesNotExist"})
		}
		if err := unstructured.SetNestedSlice(stage.Object, conditions, "spec", "selector", path); err != nil {
			return err
		}
		return delay(stage, ReadyAfter)
	case "pod-delete":
		return delay(stage, TerminateAfter)
	}
	template, _, err := unstructured.NestedString(stage.Object, "spec", "next", "statusTemplate")
	if err != nil {
		return err
	}
	if template == "CRASH" {
		return unstructured.SetNestedField(stage.Object, crashTemplate, "spec", "next", "statusTemplate")
	}
	return nil
}

func delay(stage unstructured.Unstructured, annotation string) error {
	return unstructured.SetNestedMap(stage.Object, map[string]any{
		"durationMilliseconds": int64(0),
		"durationFrom":         map[string]any{"expressionFrom": annotationOf(annotation)},
	}, "spec", "delay")
}

func annotationOf(name string) string { return fmt.Sprintf(".metadata.annotations[%q]", name) }

// decode reads the documents of a YAML file.
func decode(data []byte) ([]unstructured.Unstructured, error) {
	var objects []unstructured.Unstructured
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(data), 4096)
	for {
		var object map[string]any
		err := decoder.Decode(&object)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read YAML: %w", err)
		}
		if len(object) > 0 { // between separators there may be nothing
			objects = append(objects, unstructured.Unstructured{Object: object})
		}
	}
}
