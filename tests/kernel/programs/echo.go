// SPDX-License-Identifier: Apache-2.0

// An echo server; with a second argument, a proxy to that address, which copies with splice(2).
package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

func serve(client net.Conn) {
	defer client.Close()
	if len(os.Args) < 3 {
		buffer := make([]byte, 65536)
		for {
			count, err := client.Read(buffer)
			if count > 0 {
				if _, err := client.Write(buffer[:count]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
	server, err := net.Dial("tcp", os.Args[2])
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		io.Copy(server, client)
		server.(*net.TCPConn).CloseWrite()
	}()
	io.Copy(client, server)
}

func main() {
	listener, err := net.Listen("tcp", ":"+os.Args[1])
	if err != nil {
		panic(err)
	}
	fmt.Println("ready")
	for {
		client, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		go serve(client)
	}
}
