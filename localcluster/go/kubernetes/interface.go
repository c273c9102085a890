package main

import (
	"fmt"
	"os"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// printRuntimeInterface writes the definition of the Container Runtime Interface that this kubelet speaks, a serialized
// google.protobuf.FileDescriptorProto, to standard output. The runtime, in Python, makes its messages from it, so
// that it needs neither a copy of api.proto nor a protobuf compiler, and cannot be of another version than the kubelet.
func printRuntimeInterface() {
	file := protodesc.ToFileDescriptorProto(runtimeapi.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto)
	content, err := proto.Marshal(file)
	if err == nil {
		_, err = os.Stdout.Write(content)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}
